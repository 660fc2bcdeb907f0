// Here belongs what a store in JetStream does with one server: the tests of every store.
package natsstore_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

// lease is longer than a disk under load is silent.
const lease = 5 * time.Second

func start(t testing.TB, c embedded.Config) *embedded.Server {
	t.Helper()
	s, err := embedded.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// connected is a store that has its connection for itself.
type connected struct {
	*natsstore.Store
	nc *nats.Conn
}

func (c *connected) Close() error {
	defer c.nc.Close()
	return c.Store.Close()
}

func open(nc *nats.Conn, err error, o natsstore.Options) (*connected, error) {
	if err != nil {
		return nil, err
	}
	s, err := natsstore.New(nc, o)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &connected{s, nc}, nil
}

func TestStore(t *testing.T) {
	server := start(t, embedded.Config{Dir: t.TempDir()})
	storetest.Run(t, storetest.Many, func(t *testing.T, dir string) outbox.Store {
		nc, err := server.Connect()
		s, err := open(nc, err, natsstore.Options{Name: fmt.Sprintf("outbox-%x", sha256.Sum256([]byte(dir))), Lease: lease})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestExistingStreamIsOpenedAndNoneIsCreated(t *testing.T) {
	server := start(t, embedded.Config{Dir: t.TempDir()})
	nc, err := server.Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	options := natsstore.Options{Name: "shop", Existing: true}
	if _, err := natsstore.New(nc, options); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("without a stream: %v, want ErrStreamNotFound", err)
	}
	for _, o := range []natsstore.Options{{Name: "shop"}, options} {
		s, err := natsstore.New(nc, o)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Count(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
