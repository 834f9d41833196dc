"""What is made of finished runs: the report, its figures and findings, citations, exported models."""
