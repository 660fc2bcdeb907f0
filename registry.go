package smtprelay

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/fingerprint"
)

// Registry is a set of Clients by their Config, for a program that learns only with each message which relay to use: one that sends for
// many tenants, or reads its settings again each time. Sends with equal Configs share one Client and its connections.
//
// The zero value is ready to use. It is safe for concurrent use and must not be copied after the first use.
type Registry struct {
	// Max is the maximum number of Clients; 0 means 100. It must not be changed after the first Send. Above Max, the least
	// recently used Client is shut down in the background. A Client with a Send in progress is kept, so that there may be more
	// than Max for a while.
	Max int

	mu      sync.Mutex // guards the fields below; not held while a Client is called
	clients map[fingerprint.Sum]*registered
	leaving map[fingerprint.Sum]*registered // Clients being shut down; the next Client with the same settings waits for the shutdown
	uses    int64                           // number of acquires, of any Client
	closed  bool
}

// registered is a Client of a Registry. The Registry's lock guards it.
type registered struct {
	client *Client
	before <-chan struct{} // if not nil: closed when the previous Client with these settings is shut down
	left   chan struct{}   // closed when this Client is shut down
	sends  int             // Sends in progress
	used   int64           // value of Registry.uses at the last acquire
}

const (
	defaultMaxClients = 100
	leaveTime         = 10 * time.Second // limit for the shutdown of an unused Client
)

// Send sends m through the Client for cfg, as [Client.Send] does. If there is no such Client, Send makes one. For a mistake in
// cfg it returns the error of [New].
//
// Two Configs mean the same Client if all their fields are equal. TLSConfig, Auth, Dial, Limits.Slots and Trace cannot be compared, so a
// Config that sets one of them must have a Name: the Client uses those of the first Config with that Name and otherwise equal fields.
// Use the tenant's identifier as the Name, and another Name when one of those five has changed.
func (r *Registry) Send(ctx context.Context, cfg Config, m Message) (Receipt, error) {
	used, err := r.acquire(cfg)
	if err != nil {
		return Receipt{}, err
	}
	defer r.release(used)
	if used.before != nil {
		select {
		case <-used.before: // otherwise the relay would count the connections of both Clients
		case <-ctx.Done():
			return Receipt{}, &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: conn.ContextError(ctx)}
		}
	}
	return used.client.Send(ctx, m)
}

// Shutdown shuts down all Clients at the same time, as [Client.Shutdown] does. Later Sends fail with [ErrClosed].
func (r *Registry) Shutdown(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	var all []*Client
	for _, set := range []map[fingerprint.Sum]*registered{r.clients, r.leaving} {
		for _, used := range set {
			all = append(all, used.client)
		}
	}
	r.mu.Unlock()
	return shutdownAll(ctx, all)
}

// shutdownAll shuts down clients concurrently.
func shutdownAll(ctx context.Context, clients []*Client) error {
	errs := make([]error, len(clients))
	var ending sync.WaitGroup
	for i, c := range clients {
		ending.Go(func() { errs[i] = c.Shutdown(ctx) })
	}
	ending.Wait()
	for _, err := range errs {
		if err != nil {
			return err // the context's error, as all errors of Shutdown
		}
	}
	return nil
}

// acquire returns the Client for cfg and increments its count of Sends.
func (r *Registry) acquire(cfg Config) (*registered, error) {
	key, err := cfg.key()
	if err != nil {
		return nil, &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: err, permanent: true}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errClosed()
	}
	used := r.clients[key]
	if used == nil {
		client, err := New(cfg)
		if err != nil {
			return nil, err
		}
		used = &registered{client: client, left: make(chan struct{})}
		if last := r.leaving[key]; last != nil {
			used.before = last.left
		}
		if r.clients == nil {
			r.clients, r.leaving = make(map[fingerprint.Sum]*registered), make(map[fingerprint.Sum]*registered)
		}
		r.clients[key] = used
	}
	r.uses++
	used.sends, used.used = used.sends+1, r.uses
	r.trimLocked()
	return used, nil
}

func (r *Registry) release(used *registered) {
	r.mu.Lock()
	defer r.mu.Unlock()
	used.sends--
	r.trimLocked()
}

// trimLocked shuts down unused Clients above Max, the least recently used first.
func (r *Registry) trimLocked() {
	for most := orDefault(r.Max, defaultMaxClients); !r.closed && len(r.clients) > max(most, 1); {
		var oldest *registered
		var key fingerprint.Sum
		for k, c := range r.clients {
			if c.sends == 0 && (oldest == nil || c.used < oldest.used) {
				oldest, key = c, k
			}
		}
		if oldest == nil {
			return // all Clients are in use
		}
		delete(r.clients, key)
		r.leaving[key] = oldest
		go r.leave(key, oldest) // ends soon: no Send is in progress, and leaveTime bounds the shutdown
	}
}

// leave shuts down a Client that is not in use.
func (r *Registry) leave(key fingerprint.Sum, c *registered) {
	if c.before != nil {
		<-c.before // the previous Client may still be shutting down, if c was never used
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaveTime)
	defer cancel()
	_ = c.client.Shutdown(ctx) // on an error the Client is closed too
	close(c.left)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leaving[key] == c {
		delete(r.leaving, key)
	}
}

var errNeedsName = errors.New("a Config with a TLSConfig, an Auth, a Dial, Limits.Slots or a Trace needs a Name here, to distinguish it from others")

// key returns the key of c in a Registry.
func (c Config) key() (fingerprint.Sum, error) {
	opaque := c.TLSConfig != nil || c.Auth != nil || c.Dial != nil || c.Trace != nil || c.Limits.Slots != nil
	whole := struct {
		comparable          Config
		tls, auth, dial     bool
		trace, unverified   bool
		slots               bool
		serverName          string
		minVersion, maxVers uint16
	}{comparable: c, tls: c.TLSConfig != nil, auth: c.Auth != nil, dial: c.Dial != nil, trace: c.Trace != nil, slots: c.Limits.Slots != nil}
	if t := c.TLSConfig; t != nil {
		whole.unverified, whole.serverName, whole.minVersion, whole.maxVers = t.InsecureSkipVerify, t.ServerName, t.MinVersion, t.MaxVersion
	}
	whole.comparable.TLSConfig, whole.comparable.Auth, whole.comparable.Dial, whole.comparable.Trace = nil, nil, nil, nil
	whole.comparable.Limits.Slots = nil
	sum, all := fingerprint.Of(whole)
	if (opaque || !all) && c.Name == "" {
		return sum, errNeedsName
	}
	return sum, nil
}
