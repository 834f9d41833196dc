"""What a report is made of: sections from run folders, figures, tables, the page."""
