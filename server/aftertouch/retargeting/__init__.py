"""Who did, or did not, do a thing: counting actions, previewing a follow-up, and the people behind a selection."""
