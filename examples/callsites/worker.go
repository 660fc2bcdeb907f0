package callsites

import (
	"context"
	"fmt"

	"github.com/smtprelay/smtprelay"
)

// job is a mail in a queue.
type job struct {
	ID   int64
	From string
	To   []string
	Text []byte
}

// store keeps jobs that need more than a retry.
type store interface {
	park(id int64, why error) error      // for a person to check
	requeue(id int64, to []string) error // a new job for these recipients, in place of this one
}

// cancelled is an error after which the queue does not retry a job, as river.JobCancel makes it.
type cancelled struct{ error }

func jobCancel(err error) error { return cancelled{fmt.Errorf("cancelled: %w", err)} }

// worker sends the mails of a queue. After an error that is not jobCancel's, the queue retries the job later.
type worker struct {
	mail *smtprelay.Client
	db   store
}

func (w *worker) Work(ctx context.Context, j *job) error {
	_, err := w.mail.Send(ctx, smtprelay.Message{From: j.From, To: j.To, Body: smtprelay.Bytes(j.Text)})
	switch rest := smtprelay.RetryTo(err); {
	case err == nil:
		return nil
	case smtprelay.ShouldRetry(err):
		return err
	case smtprelay.OutcomeOf(err) == smtprelay.Unknown:
		return w.db.park(j.ID, err)
	case len(rest) > 0:
		return w.db.requeue(j.ID, rest)
	}
	return jobCancel(err)
}
