# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
