"""Draft methods, one folder each, distillation losses, the draft vocabulary and target families."""
