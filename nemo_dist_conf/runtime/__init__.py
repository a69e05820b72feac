"""Where torch comes in: typed configs, meshes, and one module per technique."""

import nemo_dist_conf.composition.agreement.shared_failure
import nemo_dist_conf.runtime.interpreter_exit  # for the exit, before what uses process groups

nemo_dist_conf.composition.agreement.shared_failure.install()
