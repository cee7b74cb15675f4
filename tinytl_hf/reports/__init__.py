"""Finished runs, read from their folders: tables, pictures, pages. Knows files only, no network."""
