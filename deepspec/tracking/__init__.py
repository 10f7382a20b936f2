"""History and deployability in MLflow: `track`, `register`, `promote`. Nothing else of the package imports mlflow."""
