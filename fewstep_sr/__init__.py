"""The methods themselves in plain torch: no ComfyUI, no diffusers, no peft."""
