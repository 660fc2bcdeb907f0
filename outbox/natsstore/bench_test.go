//go:build unix

// Here belongs what an outbox costs.
package natsstore_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

// go test -run '^$' -bench . -benchtime 5000x
func BenchmarkDelivered(b *testing.B) {
	server := start(b, embedded.Config{Dir: b.TempDir()})
	var stores atomic.Int64
	storetest.Delivered(b, func(b *testing.B) outbox.Store {
		nc, err := server.Connect()
		s, err := open(nc, err, natsstore.Options{Name: fmt.Sprintf("outbox%d", stores.Add(1)), Lease: lease})
		if err != nil {
			b.Fatal(err)
		}
		return s
	})
}
