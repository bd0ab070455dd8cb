"""What the entry point of the group `cdm_plugin` names: importing it registers the parts; its hooks are asked."""
from acme_distillation import backbone, dataset, losses  # noqa: F401  registers them
from acme_distillation.observer import cdm_after_iteration  # noqa: F401  a hook counts if this module has it
