"""What a training needs while it runs."""
