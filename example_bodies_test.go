// The example of bodies. It is alone in its file, so that go doc shows its type too.
package smtprelay_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// file is a Body that can be written repeatedly, in constant memory: it opens its file each time.
type file string

func (f file) WriteTo(w io.Writer) (int64, error) {
	r, err := os.Open(string(f))
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return io.Copy(w, r)
}

// Bodies: bytes, a reader, or anything that is an io.WriterTo, such as the messages of go-mail and gomail.
func ExampleMessage() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	const text = "Subject: hello\n\n.Hello.\n" // the client converts line ends and dots
	temp, err := os.CreateTemp("", "mail")
	if err != nil {
		log.Fatal(err)
	}
	defer os.Remove(temp.Name())
	if _, err := temp.WriteString(text); err != nil {
		log.Fatal(err)
	}
	if err := temp.Close(); err != nil {
		log.Fatal(err)
	}

	for _, body := range []io.WriterTo{
		smtprelay.Bytes([]byte(text)),
		smtprelay.Reader(strings.NewReader(text)), // can be retried, since it can seek
		file(temp.Name()),
	} {
		_, err := client.Send(context.Background(), smtprelay.Message{
			From: smtprelay.NullSender, // no bounce is sent to it
			To:   []string{"ann@example.org"},
			Body: body,
		})
		fmt.Println(err)
	}
	for _, m := range relay.Messages() {
		fmt.Printf("%q\n", m.Body)
	}
	// Output:
	// <nil>
	// <nil>
	// <nil>
	// "Subject: hello\r\n\r\n.Hello.\r\n"
	// "Subject: hello\r\n\r\n.Hello.\r\n"
	// "Subject: hello\r\n\r\n.Hello.\r\n"
}
