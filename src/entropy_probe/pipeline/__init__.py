"""The probe, end to end: settings, what the rows say of the trainer, stages, the report."""
