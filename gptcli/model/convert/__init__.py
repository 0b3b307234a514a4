"""The same model under other formats' names: tensors (`layouts.py`) and configs (`families.py`)."""
