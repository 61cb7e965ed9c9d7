"""Who hears of a sweep: Prometheus, TensorBoard, optuna-dashboard, W&B and MLflow."""
