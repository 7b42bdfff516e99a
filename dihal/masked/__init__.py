"""A causal LM post-trained into a masked diffusion LM (regime `mask`).

Absorbing diffusion over tokens (Austin et al. 2021; Sahoo et al. 2024, MDLM): at time t each token is masked with
probability t, and the network says what the masked ones were. It is the backbone itself, copied and trained further
with its attention opened from causal to full, and it keeps the next-token shift: token i is predicted at position
i - 1 (Gong et al. 2024, DiffuLLaMA). The first token of a row is therefore always given.
"""

from dihal.masked.files import load_masked, save_masked, to_causal_lm
from dihal.masked.model import MaskedLM

__all__ = ["MaskedLM", "load_masked", "save_masked", "to_causal_lm"]
