"""Networks: `tutorial` has the nets of the tutorial, exactly as they were published; the other files have ours."""
