"""What a run left behind, to look at: pictures, tables and pages. Nothing here needs torch."""
