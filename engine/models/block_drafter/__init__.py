"""What all block drafters share: anchors, backbone, objective, drafting and export."""
