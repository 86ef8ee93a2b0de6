"""As much computation for each image as it needs: cheap models first, a dearer one where they are not sure."""
