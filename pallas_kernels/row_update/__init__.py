"""New entries into stores whose entries are columns, in place."""
