// Examples of what a service needs around its mails: settings, readiness, metrics, blind copies, a rate limit, generated and signed
// bodies, tests.
package smtprelay_test

import (
	"bytes"
	"context"
	"encoding/json"
	"expvar"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"text/template"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Settings from the environment: one variable for relay, key and limits.
func ExampleParseURL_environment() {
	os.Setenv("SMTP_URL", "smtps://apikey:SG.secret@smtp.sendgrid.net:465?max_conns=4&name=orders") // in production: set by the deployment
	defer os.Unsetenv("SMTP_URL")
	cfg, err := smtprelay.ParseURL(os.Getenv("SMTP_URL"))
	if err != nil {
		log.Fatal(err)
	}
	client, err := smtprelay.New(cfg) // does not connect
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println(client)
	// Output:
	// smtprelay.Client("orders", smtp.sendgrid.net:465)
}

// A readiness probe: Ping is cheap enough to call every few seconds.
func ExampleClient_Ping_readiness() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ready := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		if err := client.Ping(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	w := httptest.NewRecorder()
	ready.ServeHTTP(w, httptest.NewRequest("GET", "/readyz", nil))
	fmt.Print(w.Code, " ", w.Body)
	// Output:
	// 200 ready
}

// Metrics: Stats is a flat struct of numbers, which expvar can publish directly.
func ExampleClient_Stats() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	expvar.Publish("smtprelay", expvar.Func(func() any { return client.Stats() })) // at /debug/vars

	for range 3 {
		err = client.SendMail("shop@example.com", []string{"ann@example.org"}, []byte("Subject: hello\r\n\r\nHello.\r\n"))
		if err != nil {
			log.Fatal(err)
		}
	}
	var stats smtprelay.Stats
	if err := json.Unmarshal([]byte(expvar.Get("smtprelay").String()), &stats); err != nil {
		log.Fatal(err)
	}
	fmt.Println(stats.Accepted, "accepted,", stats.Unknown, "unknown,", stats.Dials, "connection,", stats.Waiting, "waiting")
	// Output:
	// 3 accepted, 0 unknown, 1 connection, 0 waiting
}

// A blind copy: everybody in To gets the message, and the header alone says whom the others see.
func ExampleMessage_bcc() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	_, err = client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org", "archive@example.com"},
		Body: smtprelay.Bytes([]byte("From: shop@example.com\r\nTo: ann@example.org\r\nSubject: Your order\r\n\r\nIt is ready.\r\n")),
	})
	fmt.Println(err, relay.Messages()[0].To, strings.Contains(string(relay.Messages()[0].Body), "archive"))
	// Output:
	// <nil> [ann@example.org archive@example.com] false
}

// A body that is generated while it is sent. The function runs again for a retry.
func ExampleBodyFunc() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "421 4.3.2 restarting", Drop: true})

	order := template.Must(template.New("order").Parse("From: shop@example.com\nTo: {{.To}}\nSubject: Order {{.Number}}\n\nIt is ready.\n"))
	data := map[string]any{"To": "ann@example.org", "Number": 17}
	tries := 0
	_, err = client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.BodyFunc(func(w io.Writer) error {
			tries++
			return order.Execute(w, data)
		}),
	})
	fmt.Println(err, tries, len(relay.Messages()))
	// Output:
	// <nil> 2 1
}

// Ten messages a second, because the provider requires it. Without a Rate the Client finds the relay's limit itself.
func ExampleLimits_rate() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Limits.Rate = 10
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, []byte("Subject: hello\r\n\r\nHello.\r\n")))
	// Output:
	// <nil>
}

// A test of success and of failure. In a test, smtptest.New(t) and its Client(t) are closed at the end.
func Example_test() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	invite := func(to string) error { // the code under test
		return client.SendMail("shop@example.com", []string{to}, []byte("Subject: Welcome\r\n\r\nHello.\r\n"))
	}

	fmt.Println(invite("ann@example.org"), len(relay.Messages()))
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"})
	fmt.Println(invite("gone@example.org"))
	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true}) // lost before the reply
	fmt.Println(smtprelay.OutcomeOf(invite("bob@example.org")))
	// Output:
	// <nil> 1
	// smtprelay: RCPT TO <gone@example.org>: 550 5.1.1 "no such user"
	// unknown
}

// A program with many tenants knows only with each message which relay to use.
func ExampleRegistry() {
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS = true
	relay.Start()
	defer relay.Close()
	tenants := map[string]string{"shop": relay.URL()} // from a database

	var clients smtprelay.Registry // one for the whole program
	defer clients.Shutdown(context.Background())
	for range 3 {
		cfg, err := smtprelay.ParseURL(tenants["shop"])
		if err != nil {
			log.Fatal(err)
		}
		cfg.Name = "shop" // needed only with a TLSConfig, an Auth, a Dial or a Trace
		_, err = clients.Send(context.Background(), cfg, smtprelay.Message{
			From: "shop@example.com",
			To:   []string{"ann@example.org"},
			Body: smtprelay.Bytes(order),
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(len(relay.Messages()), "messages,", len(relay.Conns()), "connection")
	// Output: 3 messages, 1 connection
}

func ExampleFailover() {
	first, second := smtptest.NewServer(), smtptest.NewServer()
	defer first.Close()
	defer second.Close()
	first.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "554 5.3.2 down for maintenance", Count: -1})

	var clients []*smtprelay.Client
	for _, relay := range []*smtptest.Server{first, second} {
		cfg := relay.Config()
		cfg.Retry.MaxAttempts = 1 // another relay is the next try
		client, err := smtprelay.New(cfg)
		if err != nil {
			log.Fatal(err)
		}
		clients = append(clients, client)
	}
	mail := smtprelay.NewFailover(clients...)
	defer mail.Shutdown(context.Background())
	_, err := mail.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes(order),
	})
	fmt.Println(err, len(first.Messages()), len(second.Messages()))
	// Output: <nil> 0 1
}

// goMail stands for a *mail.Msg of go-mail.
type goMail struct{ from, to, text string }

func (m *goMail) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, m.text)
	return int64(n), err
}
func (m *goMail) GetSender(bool) (string, error)   { return m.from, nil }
func (m *goMail) GetRecipients() ([]string, error) { return []string{m.to}, nil }

func ExampleMessageOf() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	var msg smtprelay.GoMail = &goMail{from: "<shop@example.com>", to: "<ann@example.org>", text: "Subject: hello\r\n\r\nHi!\r\n"} // a *mail.Msg of go-mail
	m, err := smtprelay.MessageOf(msg)
	if err != nil {
		log.Fatal(err)
	}
	_, err = client.Send(context.Background(), m)
	fmt.Println(m.From, m.To, err)
	// Output: shop@example.com [ann@example.org] <nil>
}

func ExampleParseAddresses() {
	to, err := smtprelay.ParseAddresses(`"Smith, Ann" <ann@example.org>`, "bob@example.org, Carol <carol@example.org>")
	fmt.Println(to, err)
	// Output: [ann@example.org bob@example.org carol@example.org] <nil>
}

// DKIM, where the relay does not sign. Sign last, and change nothing afterwards; the signature covers the line ends, so they are CRLF
// already. sign stands for dkim.Sign of github.com/emersion/go-msgauth.
func ExampleBytes_dkim() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	sign := func(w io.Writer, rfc5322 []byte) error {
		_, err := fmt.Fprintf(w, "DKIM-Signature: v=1; d=example.com; s=mail; b=dGVzdA==\r\n%s", rfc5322)
		return err
	}

	var signed bytes.Buffer
	if err := sign(&signed, []byte("From: shop@example.com\r\nTo: ann@example.org\r\nSubject: Your order\r\n\r\nIt is ready.\r\n")); err != nil {
		log.Fatal(err)
	}
	_, err = client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes(signed.Bytes()),
	})
	fmt.Println(err, bytes.Equal(relay.Messages()[0].Body, signed.Bytes()))
	// Output:
	// <nil> true
}
