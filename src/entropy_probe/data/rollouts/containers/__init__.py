"""Files of rows, whatever the rows mean: JSON Lines, Parquet, and what ``torch.save`` wrote."""
