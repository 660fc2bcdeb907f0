// Relays with several addresses of one name.
package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// severalNodes returns a relay with n addresses of the name relay.test, its configuration, and a trace that records the dials of
// the test.
func severalNodes(t *testing.T, n int, set ...func(*smtptest.Server)) (*smtptest.Server, smtprelay.Config, *dialsTold) {
	t.Helper()
	relay := newRelay(t, append(set, func(s *smtptest.Server) { s.Addresses, s.CertNames = n, []string{"relay.test"} })...)
	system := net.DefaultResolver
	net.DefaultResolver = relay.Resolver()
	t.Cleanup(func() { net.DefaultResolver = system })
	cfg := configOf(relay)
	_, port, _ := net.SplitHostPort(relay.Addr())
	cfg.Addr, cfg.Dial, cfg.AllowInsecureAuth = "relay.test:"+port, nil, true
	cfg.Retry.MaxAttempts = 1 // a failed dial ends its Send
	told := new(dialsTold)
	cfg.Trace = told.trace()
	return relay, cfg, told
}

// dialsTold records the dials and lessons reported to a Trace.
type dialsTold struct {
	mu      sync.Mutex
	dials   []smtprelay.DialDoneInfo
	lessons []smtprelay.LearnedInfo
}

func (d *dialsTold) trace() *smtprelay.Trace {
	return &smtprelay.Trace{
		DialDone: func(_ context.Context, i smtprelay.DialDoneInfo) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.dials = append(d.dials, i)
		},
		Learned: func(_ context.Context, i smtprelay.LearnedInfo) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.lessons = append(d.lessons, i)
		},
	}
}

// nodeOf is the loopback address at which a dial ended.
func nodeOf(i smtprelay.DialDoneInfo) string {
	host, _, _ := net.SplitHostPort(i.Remote)
	return strings.TrimPrefix(host, "127.0.0.")
}

// perNode is the number of connections to each address of relay.
func perNode(relay *smtptest.Server, n int) []int {
	at := make([]int, n)
	for _, c := range relay.Conns() {
		at[c.Addr-1]++
	}
	return at
}

// illNodes are the ways in which an address may fail before AUTH.
var illNodes = map[string]smtptest.Fault{
	"closes":                       {At: smtptest.Connect, Drop: true},
	"is reset":                     {At: smtptest.Connect, Abort: true},
	"says nothing":                 {At: smtptest.Connect, Stall: true},
	"greets with 421":              {At: smtptest.Connect, Reply: "421 4.3.2 going down", Drop: true},
	"greets with 554":              {At: smtptest.Connect, Reply: "554 5.7.1 not you", Drop: true},
	"answers EHLO with 421":        {At: smtptest.EHLO, Reply: "421 4.3.2 going down", Drop: true},
	"does not answer EHLO":         {At: smtptest.EHLO, Stall: true},
	"refuses STARTTLS":             {At: smtptest.StartTLS, Reply: "454 4.7.0 TLS not available"},
	"closes within the handshake":  {At: smtptest.TLSHandshake, Drop: true},
	"is silent in the handshake":   {At: smtptest.TLSHandshake, Stall: true},
	"replies within the handshake": {At: smtptest.TLSHandshake, Reply: "421 4.3.2 going down", Drop: true},
	"answers the second EHLO only": {At: smtptest.EHLO, Nth: 2, Reply: "421 4.3.2 going down", Drop: true},
}

func TestAddressThatFailsBeforeAuthIsFollowedByTheNext(t *testing.T) {
	for name, fault := range illNodes {
		t.Run(name, func(t *testing.T) {
			relay, cfg, told := severalNodes(t, 2)
			cfg.Timeouts.Greeting, cfg.Timeouts.TLS, cfg.Timeouts.Quit = 600*time.Millisecond, 600*time.Millisecond, 200*time.Millisecond
			fault.Addr, fault.Count = 1, -1
			relay.Fault(fault)
			cfg.Limits.MaxMessagesPerConn = 1
			client := newClient(t, cfg)
			const messages = 3
			for i := range messages {
				if _, err := client.Send(t.Context(), numbered(i)); err != nil {
					t.Fatal(err)
				}
			}
			client.Close()
			if got := perNode(relay, 2); got[0] != 1 || got[1] != messages {
				t.Errorf("connections at each address: %v, want 1 and %d", got, messages)
			}
			want(t, "dials told", len(told.dials), messages)
			for _, d := range told.dials {
				if nodeOf(d) != "2" || d.Err != nil {
					t.Errorf("a dial has ended at %s: %v", d.Remote, d.Err)
				}
			}
			if len(told.lessons) != 1 || told.lessons[0].Lesson != smtprelay.LessonAddress || !strings.Contains(told.lessons[0].Text, "127.0.0.1:") {
				t.Errorf("lessons: %v", told.lessons)
			}
			want(t, "dials that failed", int(client.Stats().DialErrors), 0)
		})
	}
}

func TestAddressThatRefusesTheConnectionIsFollowedByTheNext(t *testing.T) {
	relay, cfg, told := severalNodes(t, 3)
	host, port, _ := net.SplitHostPort(cfg.Addr)
	closed, err := net.Listen("tcp", "127.0.0.9:0") // a port that is closed at the relay's addresses
	if err != nil {
		t.Fatal(err)
	}
	defer closed.Close()
	_, other, _ := net.SplitHostPort(closed.Addr().String())
	cfg.Addr = net.JoinHostPort(host, other)
	client := newClient(t, cfg)
	_, err = client.Send(t.Context(), numbered(0))
	for _, words := range []string{"connection refused", "3 addresses of the relay have failed"} {
		if !contains(err, words) {
			t.Errorf("%v, want it to contain %q", err, words)
		}
	}
	want(t, "dials told", len(told.dials), 1)
	cfg.Addr = net.JoinHostPort(host, port)
	if _, err := newClient(t, cfg).Send(t.Context(), numbered(0)); err != nil {
		t.Error(err)
	}
	want(t, "connections", len(relay.Conns()), 1)
}

// The error has the reply of the relay's last address, and that address; a reply is more useful than a refused connection.
func TestDialThatFailsAtAllAddressesReportsTheReply(t *testing.T) {
	relay, cfg, told := severalNodes(t, 3)
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 1, Drop: true, Count: -1})
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 2, Reply: "554 5.7.1 not you", Drop: true, Count: -1})
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 3, Drop: true, Count: -1})
	client := newClient(t, cfg)
	_, err := client.Send(t.Context(), numbered(0))
	for _, words := range []string{`554 5.7.1 "not you"`, "127.0.0.2:", "3 addresses of the relay have failed"} {
		if !contains(err, words) {
			t.Errorf("%v, want it to contain %q", err, words)
		}
	}
	if len(told.dials) != 1 || nodeOf(told.dials[0]) != "2" || told.dials[0].Err == nil {
		t.Errorf("dials reported: %+v", told.dials)
	}
	if got := perNode(relay, 3); !slices.Equal(got, []int{1, 1, 1}) {
		t.Errorf("connections at each address: %v", got)
	}
}

// If all of a relay's many addresses fail, one dial does not try each of them.
func TestDialTriesThreeAddressesThatAnswer(t *testing.T) {
	relay, cfg, _ := severalNodes(t, 10)
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 going down", Drop: true, Count: -1})
	client := newClient(t, cfg)
	_, err := client.Send(t.Context(), numbered(0))
	if !contains(err, "3 addresses of the relay have failed") {
		t.Error(err)
	}
	want(t, "connections", len(relay.Conns()), 3)
}

// A failure that is not the fault of one address ends the dial, and marks no address.
func TestFailureOfTheRelayIsNotRetriedAtTheNextAddress(t *testing.T) {
	for name, fault := range map[string]smtptest.Fault{
		"too many connections": {At: smtptest.Connect, Reply: "421 4.7.0 too many connections from your host", Drop: true},
		"AUTH refused":         {At: smtptest.Auth, Reply: "535 5.7.8 bad credentials"},
	} {
		t.Run(name, func(t *testing.T) {
			relay, cfg, told := severalNodes(t, 2)
			fault.Addr = 1
			relay.Fault(fault)
			client := newClient(t, cfg)
			if _, err := client.Send(t.Context(), numbered(0)); err == nil {
				t.Error("the message was accepted")
			}
			if got := perNode(relay, 2); !slices.Equal(got, []int{1, 0}) {
				t.Errorf("connections at each address: %v", got)
			}
			client.Close()
			for _, l := range told.lessons {
				if l.Lesson == smtprelay.LessonAddress {
					t.Errorf("learnt: %s", l.Text)
				}
			}
		})
	}
}

// A node that drains does not lower the number of connections to the others.
func TestAddressThatDrainsDoesNotLowerTheLimit(t *testing.T) {
	relay, cfg, _ := severalNodes(t, 2)
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 1, Reply: "421 4.3.2 going down", Drop: true, Count: -1})
	cfg.Limits.MaxConns = 4
	cfg.Limits.MaxMessagesPerConn = 2
	client := newClient(t, cfg)
	allAccepted(t, relay, sendAtOnce(t.Context(), client, 0, 40))
	want(t, "MaxConns", client.Stats().MaxConns, 4)
	want(t, "dials that failed", int(client.Stats().DialErrors), 0)
}

// The certificate is checked against the name at every address.
func TestCertificateIsCheckedAgainstTheNameAtEachAddress(t *testing.T) {
	relay, cfg, _ := severalNodes(t, 2, func(s *smtptest.Server) {})
	_, port, _ := net.SplitHostPort(cfg.Addr)
	cfg.Addr = "other.test:" + port
	client := newClient(t, cfg)
	_, err := client.Send(t.Context(), numbered(0))
	if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Op != smtprelay.OpTLS || !contains(err, "other.test") {
		t.Errorf("%v, want the name that the certificate lacks", err)
	}
	want(t, "messages", len(relay.Messages()), 0)
}

// While a dial goes from address to address, it counts as one connection against the limit.
func TestDialOverSeveralAddressesHoldsOneConnectionAtATime(t *testing.T) {
	relay, cfg, _ := severalNodes(t, 3)
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 1, Reply: "421 4.3.2 going down", Count: -1})
	relay.Fault(smtptest.Fault{At: smtptest.EHLO, Addr: 2, Reply: "421 4.3.2 going down", Count: -1})
	cfg.Limits.MaxConns = 2
	cfg.Limits.MaxMessagesPerConn = 1
	client := newClient(t, cfg)
	allAccepted(t, relay, sendAtOnce(t.Context(), client, 0, 10))
	if most := relay.Stats().MaxOpen; most > 2 {
		t.Errorf("%d connections at once, want 2 at most", most)
	}
}

// Config.Dial chooses the address itself.
func TestConfigDialGetsTheName(t *testing.T) {
	relay, cfg, told := severalNodes(t, 2)
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 going down", Drop: true, Count: -1})
	var asked []string
	cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		asked = append(asked, addr)
		return relay.Dial(ctx, network, addr)
	}
	client := newClient(t, cfg)
	if _, err := client.Send(t.Context(), numbered(0)); err == nil {
		t.Error("the message was accepted")
	}
	if !slices.Equal(asked, []string{cfg.Addr}) || len(told.dials) != 1 || nodeOf(told.dials[0]) != "1" {
		t.Errorf("dialled %q, reported %+v", asked, told.dials)
	}
}

func TestFailedLookupIsTheErrorOfTheDial(t *testing.T) {
	_, cfg, told := severalNodes(t, 1)
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, fmt.Errorf("no network")
	}}
	client := newClient(t, cfg)
	_, err := client.Send(t.Context(), numbered(0))
	e, ok := errors.AsType[*smtprelay.Error](err)
	if _, dns := errors.AsType[*net.DNSError](err); !ok || !dns || e.Op != smtprelay.OpDial || !contains(err, "lookup relay.test") {
		t.Errorf("%v", err)
	}
	if len(told.dials) != 1 || told.dials[0].Remote != "" {
		t.Errorf("dials reported: %+v", told.dials)
	}
}
