//go:build unix

// Here belongs what an outbox costs.
package sqlitestore_test

import (
	"testing"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

// go test -run '^$' -bench . -benchtime 5000x
func BenchmarkDelivered(b *testing.B) {
	storetest.Delivered(b, func(b *testing.B) outbox.Store {
		store, err := sqlitestore.Open(b.TempDir())
		if err != nil {
			b.Fatal(err)
		}
		return store
	})
}
