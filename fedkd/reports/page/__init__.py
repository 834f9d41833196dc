"""Parts of a report: sections from run folders, figures, tables and the page."""
