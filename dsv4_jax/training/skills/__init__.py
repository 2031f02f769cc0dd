"""Skills made on demand: seeded chats whose answers are known, in two splits without overlap."""
