"""The released Stable Diffusion, versions 1 and 2: its nets, its files, its words, its schedule.

    sd = load_pipeline("weights/stable-diffusion-v1-5")              # a folder of parts, or one .safetensors file
    images = sd.paint("a lighthouse in a storm, oil painting", steps=25, rng=0)    # (1, 512, 512, 3) in [0, 1]

Read `blocks` first, then `text_encoder`, `unet` and `autoencoder`, which are the nets; `tokenizer` makes numbers of
words; `weights` reads the files; `schedule` says how much noise each of the 1000 steps has; `pipeline` puts them
together; `lora` teaches the net something new.

The attributes of the nets have the names that the folder's files have ("down_blocks.0.resnets.0.conv1.weight"), so
loading is renaming nothing: only the axes change places (interop.py). Source: Rombach et al. 2022, "High-resolution
image synthesis with latent diffusion models".
"""
