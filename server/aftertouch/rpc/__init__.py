"""The gRPC surface: one servicer per service over one interceptor. Nothing else imports grpc, and no rule lives here."""
