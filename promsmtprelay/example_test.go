// An example of a service with Prometheus.
package promsmtprelay_test

import (
	"fmt"
	"log"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/promsmtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// One Metrics for the program; each Client gets its Trace and is watched.
func Example() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	metrics := promsmtprelay.New()
	registry := prometheus.NewRegistry() // or prometheus.DefaultRegisterer, which promhttp.Handler serves
	registry.MustRegister(metrics)

	cfg := relay.Config()
	cfg.Name = "news"
	cfg.Trace = metrics.Trace()
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	metrics.Watch(client)

	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, []byte("Subject: hello\r\n\r\nHello.\r\n")))
	text, err := testutil.CollectAndFormat(metrics, expfmt.TypeTextPlain, "smtprelay_messages_total")
	if err != nil {
		log.Fatal(err)
	}
	os.Stdout.Write(text)
	// Output:
	// <nil>
	// # HELP smtprelay_messages_total Messages whose Send has ended.
	// # TYPE smtprelay_messages_total counter
	// smtprelay_messages_total{client="news",outcome="accepted"} 1
	// smtprelay_messages_total{client="news",outcome="not_accepted"} 0
	// smtprelay_messages_total{client="news",outcome="unknown"} 0
}
