"""What is done to documents before they are tokenised, a file each: config -> Cleaner (`adapt.data.cleaning.base`)."""
