// The code of the package comment: all of it runs here, unchanged.

package smtptest_test

import (
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestTheFirstExampleOfTheDocRuns(t *testing.T) {
	ctx := t.Context()
	relay := smtptest.New(t)  // started; closed when the test ends
	client := relay.Client(t) // address, roots and credentials filled in; closed before the relay
	lost := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Nth: 3, Drop: true})
	for range 3 {
		client.Send(ctx, message)
	}
	err := relay.Wait(ctx, 2)     // until two messages have arrived
	first := relay.Messages()[0]  // envelope, body, connection
	hits := lost.Hits()           // how often the fault struck
	most := relay.Stats().MaxOpen // the largest number of connections open at once
	if err != nil || hits != 1 || first.To[0] != message.To[0] || most < 1 {
		t.Errorf("%v, %d hits, %+v, %d open", err, hits, first, most)
	}
}

// TestTheFaultsOfTheDocStrike checks that each fault of the package comment strikes clients that send some messages. It does not
// check what the clients make of it.
func TestTheFaultsOfTheDocStrike(t *testing.T) {
	long := message
	long.To = []string{"ann@example.org", "bob@example.org"}
	long.Body = smtprelay.Bytes([]byte(strings.Repeat("text\r\n", 200)))
	for name, fault := range map[string]func(relay *smtptest.Server) *smtptest.FaultHandle{
		"At: Rcpt, Rcpt: 'bob@example.org', Reply: '550 5.1.1 no such user'": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "bob@example.org", Reply: "550 5.1.1 no such user"})
		},
		"At: Mail, Reply: '550 5.7.1 not you'": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "550 5.7.1 not you"})
		},
		"At: FinalDot, Reply: '554 5.7.1 looks like spam'": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "554 5.7.1 looks like spam"})
		},
		"At: Accepted, Drop: true": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
		},
		"At: Mail, AfterMessages: 5, Reply: '452 4.4.5 Maximum number of messages per session exceeded', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 5, Reply: "452 4.4.5 Maximum number of messages per session exceeded", Count: -1})
		},
		"At: Rcpt, AfterRecipients: 100, Reply: '452 4.5.3 Too many recipients in this session', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Rcpt, AfterRecipients: 100, Reply: "452 4.5.3 Too many recipients in this session", Count: -1})
		},
		"At: Mail, AfterMessages: 5, Reply: '421 4.7.0 Too many messages', Drop: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 5, Reply: "421 4.7.0 Too many messages", Drop: true, Count: -1})
		},
		"At: Mail, AfterMessages: 2, Reply: '530 5.7.1 Authentication required', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 2, Reply: "530 5.7.1 Authentication required", Count: -1})
		},
		"At: Auth, Nth: 2, Every: 10, Reply: '535 5.7.8 Authentication failed', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Nth: 2, Every: 10, Reply: "535 5.7.8 Authentication failed", Count: -1})
		},
		"At: Auth, Delay: 20 * time.Second, Reply: '535 5.7.8 Authentication failed'": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Delay: 20 * time.Second, Reply: "535 5.7.8 Authentication failed"})
		},
		"At: Auth, Pipelined: true, Reply: '503 5.5.1 Bad sequence of commands', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: "503 5.5.1 Bad sequence of commands", Count: -1})
		},
		"At: Auth, Pipelined: true, Drop: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Drop: true, Count: -1})
		},
		"At: Auth, Pipelined: true, Reply: '235 2.7.0 Accepted', Drop: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: "235 2.7.0 Accepted", Drop: true, Count: -1})
		},
		"At: Auth, Pipelined: true, Discard: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Discard: true, Count: -1})
		},
		"At: Auth, Pipelined: true, Reply: '334 ', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: "334 ", Count: -1})
		},
		"At: Mail, When: func(e Event) bool { return e.AuthLed }, Reply: '530 5.7.0 Log in first', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Mail, When: func(e smtptest.Event) bool { return e.AuthLed }, Reply: "530 5.7.0 Log in first", Count: -1})
		},
		"At: Mail, When: func(e Event) bool { return e.AuthLed && e.N == 1 }, Reply: '451 4.7.0 Not yet', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Mail, When: func(e smtptest.Event) bool { return e.AuthLed && e.N == 1 }, Reply: "451 4.7.0 Not yet", Count: -1})
		},
		"At: FinalDot, Rate: 14, Burst: 14, Reply: '454 Throttling failure: Maximum sending rate exceeded.', Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Rate: 14, Burst: 14, Reply: "454 Throttling failure: Maximum sending rate exceeded.", Count: -1})
		},
		"At: Connect, Conn: 2, Stall: true": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Connect, Conn: 2, Stall: true})
		},
		"At: FinalDot, Conn: 2, Stall: true": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Conn: 2, Stall: true})
		},
		"At: FinalDot, Delay: 5 * time.Second": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: 5 * time.Second})
		},
		"At: Connect, Addr: 2, Reply: '421 4.3.2 draining', Drop: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 2, Reply: "421 4.3.2 draining", Drop: true, Count: -1})
		},
		"At: Connect, Addr: 2, Stall: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 2, Stall: true, Count: -1})
		},
		"At: Body, AfterBytes: 1000, Abort: true": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Body, AfterBytes: 1000, Abort: true})
		},
		"At: Idle, Delay: 5 * time.Second, Reply: '421 4.4.2 timeout', Drop: true, Count: -1": func(relay *smtptest.Server) *smtptest.FaultHandle {
			return relay.Fault(smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reply: "421 4.4.2 timeout", Drop: true, Count: -1})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := smtptest.New(t, inMemory, nodes(2), func(s *smtptest.Server) { s.MaxConns, s.NoTLS = -1, true })
				struck := fault(relay)
				for n := range 12 {
					client := relay.Client(t, func(c *smtprelay.Config) {
						c.Addr = relay.Addrs()[n%2]
						if n == 1 {
							c.Limits.MaxMessagesPerConn = 1 // AUTH leads the first message of the second connection
						}
					})
					messages := 2
					if n == 0 {
						messages = 60
					}
					go func() { // ends at the latest when the client is closed
						for range messages {
							client.Send(t.Context(), long)
						}
					}()
					synctest.Wait()
				}
				time.Sleep(time.Minute)
				relay.CloseClientConnections()
				if struck.Hits() == 0 {
					t.Error("the fault did not strike")
				}
			})
		})
	}
}

// Each line of code in the package comment is in this file.
func TestTheDocHasNoOtherCode(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.ReadFile("doc_test.go")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for line := range strings.Lines(string(doc)) {
		code, ok := strings.CutPrefix(line, "//\t")
		if !ok {
			continue
		}
		code, _, _ = strings.Cut(code, " //")
		code = strings.TrimSpace(code)
		if strings.HasPrefix(code, "// ") {
			continue
		}
		if lines++; !strings.Contains(string(here), code) {
			t.Errorf("not run in this file: %s", code)
		}
	}
	if lines < 25 {
		t.Errorf("%d lines of code found", lines)
	}
}
