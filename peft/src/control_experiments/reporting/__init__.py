"""From records to what people read: tables, verdicts on claims, pictures and the page."""
