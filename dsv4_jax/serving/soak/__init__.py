"""Long mixed traffic against a server, while its memory, handles and pages are watched."""
