"""From a launched campaign to messages at a provider: audience, work units, rendering, the send loop."""
