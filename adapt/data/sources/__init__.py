"""Where documents come from, a file each: config -> Source (`adapt.data.documents`)."""
