"""Memory of a run before anything is loaded, and the preview of a job."""
