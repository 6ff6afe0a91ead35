"""Files that released versions wrote: the present one reads them all."""
