// A Server with smtprelay's own client: clean-up, and the ways to point a client at a relay.

package smtptest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func inMemory(s *smtptest.Server) { s.InMemory = true }

// After a refusal the client keeps the connection, with the transaction open, for the next message. Refused recipients are the
// first thing that most people test.
func TestCloseDoesNotWaitForAnIdleClient(t *testing.T) {
	both := message
	both.To = []string{"ann@example.org", "bob@example.org"}
	all := both
	all.AllOrNothing = true
	for name, tt := range map[string]struct {
		m     smtprelay.Message
		fault smtptest.Fault
	}{
		"nothing refused":         {both, smtptest.Fault{}},
		"the only recipient":      {message, smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}},
		"one of two, all or none": {all, smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}},
		"one of two":              {both, smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}},
		"the sender":              {both, smtptest.Fault{At: smtptest.Mail, Reply: "550 5.7.1 not you"}},
		"the body":                {both, smtptest.Fault{At: smtptest.Data, Reply: "554 5.7.1 not this"}},
		"the message":             {both, smtptest.Fault{At: smtptest.FinalDot, Reply: "554 5.7.1 spam"}},
	} {
		for _, set := range []func(*smtptest.Server){func(*smtptest.Server) {}, func(s *smtptest.Server) { s.NoTLS = true }} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					relay := smtptest.New(t, inMemory, set)
					fault := relay.Fault(tt.fault)
					client := relay.Client(t)
					client.Send(t.Context(), tt.m)
					if tt.fault.Reply != "" && fault.Hits() != 1 {
						t.Fatalf("%d hits", fault.Hits())
					}
					if relay.Stats().Open != 1 {
						t.Fatalf("%d connections are open", relay.Stats().Open)
					}
					began := time.Now()
					relay.Close()
					if waited := time.Since(began); waited != 0 { // in a bubble time passes only while everything waits
						t.Errorf("Close waited %v", waited)
					}
				})
			})
		}
	}
}

func TestClientsAreClosedBeforeTheRelay(t *testing.T) {
	tb := &faulty{TB: t}
	relay := smtptest.New(tb)
	clients := []*smtprelay.Client{relay.Client(tb), relay.Client(tb)}
	for i, cleanup := range slices.Backward(tb.cleanups) {
		for n, client := range clients {
			_, err := client.Send(t.Context(), message)
			if closed := errors.Is(err, smtprelay.ErrClosed); closed != (n >= i) || !closed && err != nil {
				t.Errorf("with %d clean-ups left, client %d returned: %v", i+1, n+1, err)
			}
		}
		cleanup()
	}
	if len(tb.cleanups) != 3 {
		t.Errorf("%d clean-ups", len(tb.cleanups))
	}
	if nc, err := net.Dial("tcp", relay.Addr()); err == nil {
		nc.Close()
		t.Error("the relay is open")
	}
}

// A client that outlives its relay closes without an error.
func TestRelayMayBeClosedBeforeItsClients(t *testing.T) {
	tb := &faulty{TB: t}
	relay := smtptest.NewServer()
	client := relay.Client(tb)
	if _, err := client.Send(t.Context(), message); err != nil {
		t.Error(err)
	}
	relay.Close()
	for _, cleanup := range slices.Backward(tb.cleanups) {
		cleanup()
	}
	if _, err := client.Send(t.Context(), message); !errors.Is(err, smtprelay.ErrClosed) {
		t.Errorf("the client is not closed: %v", err)
	}
}

func TestClientTakesOptions(t *testing.T) {
	relay := smtptest.New(t)
	client := relay.Client(t,
		func(c *smtprelay.Config) { c.LocalName = "first.example" },
		func(c *smtprelay.Config) { c.LocalName = "second." + c.LocalName })
	said := relay.Fault(smtptest.Fault{At: smtptest.EHLO, Count: -1, When: func(e smtptest.Event) bool {
		return strings.HasSuffix(e.Line, " second.first.example")
	}})
	if _, err := client.Send(t.Context(), message); err != nil {
		t.Fatal(err)
	}
	if said.Hits() != 2 {
		t.Errorf("%d hits", said.Hits())
	}
}

// A faulty is a testing.TB that records failures and clean-ups.
type faulty struct {
	testing.TB
	failed   bool
	cleanups []func()
}

func (f *faulty) Cleanup(cleanup func()) { f.cleanups = append(f.cleanups, cleanup) }

func (f *faulty) Fatalf(string, ...any) { f.failed = true; panic(f) }

func TestClientFailsTheTestForAMistake(t *testing.T) {
	relay := smtptest.New(t)
	tb := &faulty{TB: t}
	func() {
		defer func() { recover() }()
		relay.Client(tb, func(c *smtprelay.Config) { c.Limits.MaxConns = -7 })
	}()
	if !tb.failed {
		t.Error("the test was not failed")
	}
}

func TestWaitForMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := smtptest.New(t, inMemory)
		client := relay.Client(t)
		if err := relay.Wait(t.Context(), 0); err != nil {
			t.Error(err)
		}
		come := make(chan error, 3)
		for range 3 { // several may wait at once
			go func() { come <- relay.Wait(t.Context(), 2) }()
		}
		client.Send(t.Context(), message)
		synctest.Wait()
		if len(come) != 0 {
			t.Error("Wait did not wait for the second message")
		}
		client.Send(t.Context(), message)
		for range 3 {
			if err := <-come; err != nil {
				t.Error(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := relay.Wait(ctx, 3)
		if !errors.Is(err, context.DeadlineExceeded) || err.Error() != "smtptest: 2 of 3 messages have come: context deadline exceeded" {
			t.Errorf("%v", err)
		}
	})
}

func TestStatsAreOnePicture(t *testing.T) {
	relay := smtptest.New(t, func(s *smtptest.Server) { s.MaxMessages = 2 })
	client := relay.Client(t)
	for range 3 {
		if _, err := client.Send(t.Context(), message); err != nil {
			t.Fatal(err)
		}
	}
	st := relay.Stats()
	conns := relay.Conns()
	if st.Conns != len(conns) || st.Conns != 2 || st.Accepted != 3 || st.Duplicates != 2 || st.Auths != 2 || st.Commands["EHLO"] != 4 || st.MaxOpen != 2 && st.MaxOpen != 1 {
		t.Errorf("%+v", st)
	}
	mails, turns := 0, 0
	for _, c := range conns {
		mails += c.Mails
		turns += c.Turns
	}
	if st.Mails != mails || st.Turns != turns || st.Commands["MAIL"] != mails || st.Refused != mails-3 {
		t.Errorf("%+v, %d MAIL, %d turns", st, mails, turns)
	}
	st.Commands["EHLO"], conns[0].Commands["EHLO"] = 0, 0
	if relay.Stats().Commands["EHLO"] != 4 || relay.Conns()[0].Commands["EHLO"] != 2 {
		t.Error("a caller has changed what the relay counts")
	}
}

// From its URL alone a program reaches the relay and verifies its certificate.
func TestURLTellsHowToTrustTheRelay(t *testing.T) {
	for _, implicit := range []bool{false, true} {
		relay := smtptest.NewUnstartedServer()
		scheme := "smtp"
		if implicit {
			scheme = "smtps"
			relay.StartTLS()
		} else {
			relay.Start()
		}
		defer relay.Close()
		u, err := url.Parse(relay.URL())
		if err != nil || relay.URL() != u.String() {
			t.Fatal(u, err)
		}
		password, _ := u.User.Password()
		if u.Scheme != scheme || u.Host != relay.Addr() || u.User.Username() != relay.Username || password != relay.Password || len(u.Query()) != 1 {
			t.Errorf("%s", u)
		}
		ca := u.Query().Get("ca")
		file, err := os.ReadFile(ca)
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(file) || !roots.Equal(relay.Roots()) {
			t.Errorf("the file is %q", file)
		}
		if implicit {
			c, err := tls.Dial("tcp", u.Host, &tls.Config{RootCAs: roots})
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		relay.Close()
		if _, err := os.Stat(ca); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Close has left %s: %v", ca, err)
		}
	}
}

func TestURLWithoutTLSIsReadByParseURL(t *testing.T) {
	relay := smtptest.New(t, func(s *smtptest.Server) { s.NoTLS = true })
	cfg, err := smtprelay.ParseURL(relay.URL())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TLS != smtprelay.TLSNone || cfg.Addr != relay.Addr() || cfg.Username != relay.Username {
		t.Errorf("%s is read as TLS %v, address %s", relay.URL(), cfg.TLS, cfg.Addr)
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Send(t.Context(), message); err != nil {
		t.Error(err)
	}
}

func nodes(n int) func(*smtptest.Server) { return func(s *smtptest.Server) { s.Addresses = n } }

// Each address has its own faults; everything else is shared.
func TestAddresses(t *testing.T) {
	for _, set := range []func(*smtptest.Server){inMemory, func(*smtptest.Server) {}} {
		relay := smtptest.New(t, nodes(3), set)
		relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Addr: 2, Reply: "450 4.2.0 not here", Count: -1})
		addrs := relay.Addrs()
		if len(addrs) != 3 || addrs[0] != relay.Addr() {
			t.Fatalf("%q", addrs)
		}
		var got []bool
		for i, addr := range addrs {
			host, port, err := net.SplitHostPort(addr)
			if want := []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"}[i]; err != nil || host != want || !strings.HasSuffix(relay.Addr(), ":"+port) {
				t.Errorf("%q, %v", addr, err)
			}
			client := relay.Client(t, func(c *smtprelay.Config) { c.Addr = addr })
			_, err = client.Send(t.Context(), message)
			got = append(got, err == nil)
		}
		if !slices.Equal(got, []bool{true, false, true}) {
			t.Errorf("accepted: %v", got)
		}
		at := make([]int, 4)
		for _, c := range relay.Conns() {
			at[c.Addr]++
		}
		if at[1] != 1 || at[2] == 0 || at[3] != 1 || len(relay.Messages()) != 2 || relay.Stats().Duplicates != 1 {
			t.Errorf("connections %v, %+v", at, relay.Stats())
		}
	}
}

func TestResolverGivesEveryNameTheAddresses(t *testing.T) {
	relay := smtptest.New(t, nodes(4))
	resolver := relay.Resolver()
	for _, name := range []string{"smtp.test", "node", "a.very.long.name.of.a.relay.example"} {
		ips, err := resolver.LookupHost(t.Context(), name)
		if err != nil || !slices.Equal(ips, []string{"127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"}) {
			t.Errorf("%s: %q, %v", name, ips, err)
		}
	}
	if txt, err := resolver.LookupTXT(t.Context(), "smtp.test"); err == nil {
		t.Errorf("TXT: %q", txt)
	}
	_, port, _ := net.SplitHostPort(relay.Addr())
	dialer := &net.Dialer{Resolver: resolver}
	client := relay.Client(t, func(c *smtprelay.Config) {
		c.Addr = net.JoinHostPort("smtp.test", port)
		c.Dial = dialer.DialContext
	})
	if _, err := client.Send(t.Context(), message); err != nil {
		t.Error(err)
	}
}

func TestNewStartsARelayThatNobodyElseHas(t *testing.T) {
	relay := smtptest.New(t, inMemory, (*smtptest.Server).StartTLS)
	if cfg := relay.Config(); cfg.TLS != smtprelay.TLSImplicit || cfg.Dial == nil {
		t.Errorf("%+v", cfg.TLS)
	}
	if _, err := relay.Client(t).Send(t.Context(), message); err != nil {
		t.Error(err)
	}
}
