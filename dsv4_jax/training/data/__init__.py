"""Data of training: documents, packed rows on disk, and batches as functions of a row number."""
