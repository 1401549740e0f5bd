# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What a training script needs besides its loop: checkpoints, interruption, moving averages, launching and pushing."""
