//go:build unix

// Here belongs what needs a worker that is killed. It is this test's binary again, as a process of its own.
package natsstore_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

func TestMain(m *testing.M) {
	if text := os.Getenv("NATSSTORE_NODE"); text != "" {
		if err := serve(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if storetest.Child(openPlace) {
		return
	}
	os.Exit(m.Run())
}

// serve is a server of that configuration until the standard input ends; it begins when a line has come.
func serve(text string) error {
	var c embedded.Config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return err
	}
	s, err := embedded.Start(c)
	if err != nil {
		return err
	}
	defer s.Close()
	_, _ = io.Copy(io.Discard, in)
	return nil
}

// place is a store as openPlace takes it. The lease is short, so that workers that were killed are found out soon.
func place(url string) string { return url + " outbox 1 1s" }

// openPlace opens the store of a place: URL, name, replicas, lease.
func openPlace(place string) (outbox.Store, error) {
	var url, name, lease string
	var replicas int
	if _, err := fmt.Sscan(place, &url, &name, &replicas, &lease); err != nil {
		return nil, err
	}
	o := natsstore.Options{Name: name, Replicas: replicas}
	var err error
	if o.Lease, err = time.ParseDuration(lease); err != nil {
		return nil, err
	}
	nc, err := natsstore.Connect(url)
	return open(nc, err, o)
}

func TestKilledWorkerLosesNothingAndSendsNothingTwice(t *testing.T) {
	storetest.Kills(t, storetest.Engine{Open: openPlace, Kills: 5, Most: map[string]int{"at end": 10, "early": 16},
		Place: func(t *testing.T) string {
			return place(start(t, embedded.Config{Dir: t.TempDir(), Listen: "127.0.0.1:0"}).URL())
		}})
}
