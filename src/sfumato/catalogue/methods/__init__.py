"""The formulas, each written once over :class:`~sfumato.catalogue.machine.Machine`."""
