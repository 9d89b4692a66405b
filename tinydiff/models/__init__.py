"""Networks: `tutorial` has those of the lineage, exactly as they were published; the other files have ours."""
