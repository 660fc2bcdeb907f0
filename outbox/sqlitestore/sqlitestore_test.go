// Here belongs what a folder is to be seen doing: the tests of every store, fsyncs, bodies beside the database.
package sqlitestore

import (
	"testing"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, storetest.One, func(t *testing.T, dir string) outbox.Store {
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}
