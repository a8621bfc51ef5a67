# One image for `serve`, `worker` and `migrate`; docs/operations.md says how to run it.

FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/aftertouch
COPY constraints/server.txt constraints/
RUN /opt/aftertouch/bin/pip install --no-cache-dir --no-deps --require-hashes -r constraints/server.txt
COPY LICENSE README.md pyproject.toml ./
COPY server server
COPY plugins plugins
# The build backend is pinned among the constraints, so nothing here comes without a hash.
RUN /opt/aftertouch/bin/pip install --no-cache-dir --no-deps --no-build-isolation \
    . plugins/aftertouch-push plugins/aftertouch-sms plugins/aftertouch-twilio \
    plugins/aftertouch-whatsapp

FROM python:3.11-slim
COPY --from=build /opt/aftertouch /opt/aftertouch
# A home that can be written: the spool lives in it, and without AFTERTOUCH_DATABASE_URL an embedded PostgreSQL.
RUN useradd --create-home --uid 10001 aftertouch
USER aftertouch
WORKDIR /home/aftertouch
# A volume that is new takes over whose it is.
RUN mkdir -m 700 .aftertouch
ENV PATH=/opt/aftertouch/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AFTERTOUCH_GRPC_ADDRESS=0.0.0.0:7070 \
    AFTERTOUCH_HTTP_ADDRESS=0.0.0.0:7071 \
    AFTERTOUCH_LOG_FORMAT=json
EXPOSE 7070 7071
# SIGTERM is an orderly stop; give it 30 seconds.
STOPSIGNAL SIGTERM
ENTRYPOINT ["aftertouch"]
CMD ["serve"]
