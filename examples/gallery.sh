#!/usr/bin/env bash
# Every task and application of Versatile Diffusion, one command each, with the model that the package brings.
#   bash examples/gallery.sh [MODEL] [OUTPUT]
# MODEL may be a run of your own. examples/gallery.py puts the results together to the images of docs/gallery.md.
set -euo pipefail
model=${1:-tiny} out=${2:-demo/gallery}
settings="checkpoint=$model resolution=64 steps=25 guidance_scale=3 seed=3"
circle=examples/images/circle.png star=examples/images/star.png square=examples/images/square.png
mask=examples/images/lower-half.png

# Text-to-image.
vdtrain sample $settings output_dir="$out/text-to-image" \
    "a red circle on a white background" "a blue star on a black background" "a green square on a white background"

# Image variation, image-to-text, text variation.
vdtrain sample $settings $star flow=image-to-image samples_per_input=4 output_dir="$out/image-variation"
vdtrain sample $settings $star flow=image-to-text samples_per_input=4 output_dir="$out/image-to-text"
vdtrain sample $settings "a large red circle" flow=text-to-text samples_per_input=4 \
    output_dir="$out/text-variation"

# Dual-context blender: one caption and one image, from all image to all caption.
for weight in 0.1 0.5 1 2 10; do
    vdtrain blend $settings output_dir="$out/dual-context/$weight" \
        "contexts=[{text: \"a yellow square\", weight: $weight}, {image: $star}]"
done

# Multi-context blender: two images, the first of them seen through a mask, and a caption.
vdtrain blend $settings output_dir="$out/multi-context" samples=4 \
    "contexts=[{image: $circle, mask: $mask}, {image: $square}, {text: \"a picture on a black background\", weight: 2}]"

# Semantic-style disentanglement: from content alone to style alone.
for focus in 0 0.3 0.4 0.5 1; do
    vdtrain sample $settings $circle flow=image-to-image focus=$focus output_dir="$out/focus/$focus"
done

# Image-to-image from a partly noised latent: a new caption on an old image.
for fidelity in 0.1 0.3 0.5 0.7 0.8; do
    vdtrain sample $settings "a yellow square" start_from=$star fidelity=$fidelity \
        output_dir="$out/image-to-image/$fidelity"
done

# Latent image-to-text-to-image editing.
vdtrain edit $settings $star remove="a star" add="a circle" output_dir="$out/edit/0"
vdtrain edit $settings $star remove="blue" add="green" output_dir="$out/edit/1"
vdtrain edit $settings $circle remove="a circle" add="a triangle" output_dir="$out/edit/2"
