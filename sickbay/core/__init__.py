"""The vocabulary everything else speaks: signals, readings, charts, conditions, diagnoses. No torch in here."""
