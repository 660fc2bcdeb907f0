package callsites

import (
	"context"
	"database/sql"
	"errors"

	"github.com/smtprelay/smtprelay"
)

// batch sends the mails of all new rows and stores each outcome. Rows whose mail could not be sent stay new, for the next run; so
// do those not sent yet when ctx ends, on Ctrl-C.
func batch(ctx context.Context, db *sql.DB, c *smtprelay.Client) error {
	rows, err := db.QueryContext(context.WithoutCancel(ctx), `select id, email from mails where state = 'new'`)
	if err != nil {
		return err
	}
	defer rows.Close()
	source := make(chan error, 1) // SendAll reads the rows in a separate goroutine
	messages := func(yield func(smtprelay.Message) bool) {
		for rows.Next() {
			var id int64
			var to string
			if err := rows.Scan(&id, &to); err != nil {
				source <- err
				return
			}
			if !yield(smtprelay.Message{From: "news@example.com", To: []string{to}, Body: smtprelay.Bytes(message(to)), Tag: id}) {
				break
			}
		}
		source <- rows.Err()
	}
	var errs error
	for r := range c.SendAll(ctx, messages) {
		if !smtprelay.ShouldRetry(r.Err) {
			_, err := db.Exec(`update mails set state = $1 where id = $2`, smtprelay.OutcomeOf(r.Err).String(), r.Message.Tag)
			errs = errors.Join(errs, err)
		}
	}
	return errors.Join(errs, <-source)
}
