"""News of messages on its way into the receipts: tokens, who is meant, and group commit."""
