//go:build unix

// Here belongs what needs a worker that is killed. It is this test's binary again, as a process of its own.
package natsstore_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

func TestMain(m *testing.M) {
	if storetest.Child(openPlace) {
		return
	}
	os.Exit(m.Run())
}

// openPlace opens the store of a place, which is a URL and a name.
func openPlace(place string) (outbox.Store, error) {
	url, name, _ := strings.Cut(place, " ")
	nc, err := natsstore.Connect(url)
	return open(nc, err, name, time.Second) // short, so that workers that were killed are found out soon
}

func TestKilledWorkerLosesNothingAndSendsNothingTwice(t *testing.T) {
	storetest.Kills(t, storetest.Engine{Open: openPlace, Kills: 5, Most: map[string]int{"at end": 25, "early": storetest.InHand},
		Place: func(t *testing.T) string {
			return start(t, embedded.Config{Dir: t.TempDir(), Listen: "127.0.0.1:0"}).URL() + " outbox"
		}})
}
