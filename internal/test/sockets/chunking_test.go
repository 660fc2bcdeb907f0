package sockets

import "github.com/smtprelay/smtprelay"

// The one place that knows how a Config enables CHUNKING.

func setChunking(cfg *smtprelay.Config, chunking bool) { cfg.Chunking = chunking }
